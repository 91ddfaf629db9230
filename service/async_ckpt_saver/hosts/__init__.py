"""Savers of several hosts as one: the lead, which commits, and relays, which hand over what their ranks have staged.

    lead                                             relay
    listener -> sessions -> reception -> hub         relay_desk -> relay_run -> dialler
                            remote (a rank whose     outgoing (what goes next), spans (which bytes)
                            cells the lead writes)

`link_words` is what they say, `lane` how none of it gets lost.
"""
