"""A conversion as a job of a Ray cluster that is there already: ``exl2ray submit``.

``jobs.py`` speaks HTTP to the job server of the head node; ``preflight.py`` is the small job that looks, from every node, at
the paths of the command before it is submitted: they exist, can be written, and a file that the head writes is seen by all.
Nodes that join later are checked by their workers (the nonce file). ``submission.py`` puts both together. The job is the same
``exl2ray convert`` on the head node. Following it survives broken connections: its log is read from the start again, and
what was shown is left out.
"""
