"""The report: reads what runs left on disk and shows it, as a table and as one offline page in two languages.

    results.py  a run directory -> RecordedRun      surprisal.py, samples.py  two of its files
    lenient.py  readers of values from any JSON: a report is wanted most when a run has broken
    tables.py   RecordedRuns -> rows -> Markdown, CSV: one entry per column
    chart.py    numbers -> inline SVG       figures.py, several.py  the drawings       images.py  SVG and PNG files
    wording.py  texts and number formats, English and Brazilian Portuguese (templates/strings.yaml)
    html.py     RecordedRuns -> one self-contained page       pages.py  the templates of this page and the explorer's

Nothing here imports torch or computes a measure: figures are shown as the evaluation wrote them.
"""
