"""The command line: `problem` is what to measure, by name, and `weights` what it loads; `report`
measures it and shows what was found; `eigs` is ``lyapcuda eigs``, `plot` ``lyapcuda plot``;
`program` is what every program does alike.
"""
