"""HTTP: embeddings, classification and search for programs and, with a page, for people.

Needs the extra `serve`. `run.serve` is the verb `align serve`; `app.Endpoints` makes the routes.
"""
