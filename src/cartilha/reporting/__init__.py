"""The report: reads what runs left on disk and shows it, as a table and as one offline page in two languages.

    results.py  run directory -> RunRecord      lenient: a report is wanted most when a run has broken
    lenient.py  values of a wanted type, or None       surprisal.py, samples.py  what is shown of each
    tables.py   RunRecords -> rows -> Markdown, CSV
    chart.py    numbers -> inline SVG       figures.py  a run's drawings       images.py  them as SVG and PNG files
    wording.py  texts and number formats, English and Brazilian Portuguese (templates/strings.yaml)
    html.py     RunRecords -> one self-contained page (templates/)

Nothing here imports torch or computes a measure: figures are shown as the evaluation wrote them.
"""
