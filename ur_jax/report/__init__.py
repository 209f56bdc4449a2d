"""What a person sees: tables on the terminal, plots of a run, the report of many runs.

`collect` reads the summaries of a working directory, `compare` says what differs between encoders,
`figures` draws the jobs' curves and `agreement` rank correlations, `drawn` puts them on the page,
which `page` writes as one HTML file; `build` puts the report together.
Drawing and the page need the extra `report`; importing this package needs none.
"""
