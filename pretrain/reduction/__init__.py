"""Token reduction is data: the kept indices are drawn here, shipped by the loader, gathered in the
tower.
"""
