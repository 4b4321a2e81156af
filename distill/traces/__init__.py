"""Traces on disk: Parquet shards with text, ids and the teacher's distribution at every position.

    schema.py          the columns of a shard and its metadata
    quantisation.py    distributions as integer steps, and back
    codec.py           Traces <-> Arrow tables <-> Parquet bytes
    folder.py          the files in a folder: shards, manifests, the writer's lock
    writer.py          TraceWriter: writes shards in the background; after a kill it adds exactly the missing traces
    reader.py          open_traces: streamed and shuffled reading of a folder, a selection or one shard
    batches.py         traces as rows and as padded batches of tensors, for one's own trainer
    filters.py         the filters that a recipe may name (this module is their registry)
    contamination.py   an evaluation set for the filter `decontaminate`
    selection.py       runs filters over a folder and writes the numbers of the rows they keep
    verify.py          checks a folder and repairs it
    summary.py         statistics of a folder
    export.py          the text as SFT JSONL or a `datasets` folder; merging folders
    provenance.py      the origin of the text, and the certificate of an audit
    data_card.py       the data card
    push.py            upload to the hub as a data set

Import the modules by name. Nothing is re-exported here, so that naming a filter imports nothing else.
"""
