"""The report: reads what runs left on disk and shows it, as a table and as one offline page in two languages.

    results.py  run directory -> RunRecord      lenient: a report is wanted most when a run has broken
    tables.py   RunRecords -> rows -> Markdown, CSV
    chart.py    numbers -> inline SVG
    wording.py  texts and number formats, English and Brazilian Portuguese (templates/strings.yaml)
    html.py     RunRecords -> one self-contained page (templates/)

Nothing here imports torch or computes a measure: figures are shown as the evaluation wrote them.
"""
