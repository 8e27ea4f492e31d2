"""What makes the site: measured data, generated parts of pages, formulas, links, pictures.

`docs/refresh.py` measures and writes `docs/data`; `docs/conf.py` lets Sphinx read it through
`building.extension`; `docs/check.py` looks at what came out.
"""
