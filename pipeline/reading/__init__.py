"""Where rows come from: list shards, cut them into units, read those front to back, prepare their images."""
