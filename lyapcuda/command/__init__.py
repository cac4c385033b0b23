"""The command line: `problem` is what to measure, by name; `report` measures it and shows what was
found; `eigs` is ``lyapcuda eigs``; `program` is what every program of ours does alike.
"""
