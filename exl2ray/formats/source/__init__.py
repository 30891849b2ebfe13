"""What may lie in the folder that a user calls a model, and how much of it can be converted.

The rule: what transformers loads and ExLlamaV2 can run is converted; everything else is refused before any work, with what
was found, why it cannot work, and the one thing to do about it.

* ``kinds``: folders that are no Hugging Face model in safetensors at all (GGUF, adapters, pickles, caches, ...)
* ``training``: checkpoints of a training run, in pieces for its ranks (FSDP, DeepSpeed, Megatron)
* ``quantised``: models that are quantised already, told by their tensors and by what config.json says
* ``dequantise``: those among them that can be read all the same, FP8 and MXFP4
* ``model_shards``: which weight files count, where an index is wrong or there are copies
* ``wrapped_names``: names of tensors that a wrapper (torch.compile, PEFT, ...) has changed
* ``architecture_name``: config.json without a usable ``architectures``
* ``folder``: the only place that lists a folder and reads its small files
"""
