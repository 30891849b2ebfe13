"""Before a conversion: what would stop it, and what it will need. From the config and tensor headers, without computing.

``problems.py`` is the one list of checks that `plan` and `convert` share; the others answer one question each: ``sizes``
(bytes of the output), ``worker_memory`` (RAM and VRAM), ``disk``, ``times``, ``fit`` (which bitrate fits a card), ``scan``
(values of the weights), ``probe`` (the worst layer and the head, for real).
"""
