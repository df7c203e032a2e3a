"""Which pairs to keep: curate is the way in. ingest reads tables (columns finds what is what,
metadata_table makes arrays of them), presets/ list rules, engines run them (DuckDB, Spark,
BigQuery), metaclip and metadata_entries balance by concepts, report counts what went and why.
"""
