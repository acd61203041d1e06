"""Programs that are started by an agent's own interpreter, where this package is not installed.

They have a folder to themselves: the interpreter puts it on `sys.path`, and nothing else of ours
may answer the agent's imports.
"""
