"""One method a file: pure functions on features first, then the method as the suite runs it.

A method that must back-propagate into a tower gets its place here too; none is built yet.
"""
