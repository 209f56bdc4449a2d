"""What a person sees: tables on the terminal, plots of a run, the report of many runs.

`collect` reads the summaries of a working directory, `compare` says what differs between encoders,
`figures` draws the jobs' curves, `page` writes one HTML file, `build` puts the report together.
Drawing and the page need the extra `report`; importing this package needs none.
"""
