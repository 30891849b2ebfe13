"""Model cards, and uploads to the Hugging Face Hub.

    card.py         README.md of an output directory, and of a repository with branches; the texts are *.jinja
    frontmatter.py  the YAML block at the top of a card
    base_model.py   what a card says about where the model comes from: base model, original card, command
    selection.py    which files of a directory are published, and which are refused
    token.py        the access token, and keeping it out of everything that is shown
    upload.py       the Hub itself; the only file that imports huggingface_hub
"""
