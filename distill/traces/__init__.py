"""Traces on disk: Parquet shards that hold text, ids and the teacher's distribution at every position.

    schema.py     the columns, and what a file says about itself (Metadata)
    distribution.py    a position's distribution made small, and back
    codec.py      Traces <-> Arrow tables <-> Parquet bytes
    folder.py     what lies in a folder: manifests, the writer's lock, files that appear whole or not at all
    writer.py     TraceWriter: shards written in the background, exactly once, whatever kills it
    reader.py     open_traces: streaming and shuffled reading of a folder, a selection or one shard
    filters.py    the filters a recipe may name (this module is their registry)
    contamination.py   an evaluation set as the decontaminate filter sees it
    selection.py  runs filters over a folder and writes which rows they keep, never the rows themselves
    verify.py     is everything there and whole; drop what is not
    stats.py      what a folder holds, in numbers
    export.py     the text as SFT JSONL or a `datasets` folder; several folders merged into one
    notes.py      what stands beside a manifest: who wrote the text, what an audit found
    card.py       the data card
    push.py       a folder of traces as a data set on the hub

Modules are imported by name; nothing is re-exported here, so that naming a filter costs no more than it must.
"""
