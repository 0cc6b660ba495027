"""Random programs of attention, and what it means that a rewritten one computes the same.

``draft`` holds a program under construction, ``layout``, ``products``, ``scores``, ``masks`` and
``hostile`` write its parts, ``generate`` puts them in order, and ``verdict`` runs it both ways.
``canonical`` holds attentions as models write them, ``subject`` one of them as a graph to edit,
and ``mutations`` the edits. Nothing here looks at how the passes find an attention.
"""
