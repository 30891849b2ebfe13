"""Model cards, and uploads to the Hugging Face Hub.

    card.py         README.md of an output directory, and of a repository with branches; the texts are *.jinja
    frontmatter.py  the YAML block at the top of a card
    base_model.py   what a card says about where the model comes from: base model, original card, command
    selection.py    which files of a directory are published, and which are refused: by name (file_kinds.py), as
                    regular files (opened.py), and by what they hold (secrets.py)
    release.py      what goes to a repository: the directories with their cards and figures, and what goes along
    sending.py      the way there, a commit for each branch
    hub.py          the Hub itself; the only file here that imports huggingface_hub
"""
