"""Models as names and lazy tensors: read from others' files and ours, transformed, written in
shards as they come. No process group is needed."""
