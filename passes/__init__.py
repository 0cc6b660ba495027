"""Graph passes: find attention in an FX graph, prove what it computes, rewrite it.

Pure graph work: nothing here runs a kernel or asks what a device can do.
"""
