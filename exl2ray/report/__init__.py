"""Plots and the HTML report of a work directory.

``facts.py``, ``chains.py`` and ``tuned.py`` read the directory, ``time_spent.py`` its event log. ``figures.py`` and
``ladder.py`` draw, ``page.py`` puts it together. Only ``style.py`` and what imports it loads matplotlib, so whoever wants a
plot at the end of a run imports it there.
"""
