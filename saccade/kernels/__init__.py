"""Three verbs: attend, scan, merge; and what selection needs: scores and topk."""
