"""The files of a converted model: what its shards hold, how they get it, and who may write where."""
