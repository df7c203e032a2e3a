"""Where pairs come from. open_source is the way in; then one file for each kind of source.

files (tables, samples and class folders in folders, zips and tars: archives, image_finder), shards
(many archives), img2dataset, packed (TFDS ArrayRecord), parquet (image bytes), scenes (procedural).
All hand on record.Record. tables reads caption tables (table_files, separated, parquet_table,
column_names), captions the texts that a vocabulary is learned from.
"""
