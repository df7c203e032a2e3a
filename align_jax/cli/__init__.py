"""The command line: `main` finds the verb, one file a group of verbs says what each does.

main (train, eval, compile), model_verbs (classify, embed, convert), data_verbs (scan, curate,
decontaminate, pack, vocab), score_verbs (score, entries), bench_verbs (bench).
"""
