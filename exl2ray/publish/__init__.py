"""Model cards, and uploads to the Hugging Face Hub.

    card.py         README.md of an output directory, as a function of plain facts
    frontmatter.py  the YAML block at the top of a card
    origin.py       what a card says about where the model comes from: base model, original card, command
    figures.py      results of an evaluation
    folder.py       which files of a directory are published, and which are refused
    token.py        the access token, and keeping it out of everything that is shown
    hub.py          the Hub itself; the only file that imports huggingface_hub
    index.py        the card of a repository that has a branch for each bitrate
"""
