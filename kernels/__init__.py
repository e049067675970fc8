"""Device code: one file is one kernel.  No torch here; `flashmla_cute` launches it.

Reading order: config.py (what is specialised at compile time), schedule.py (lengths -> spans of work), dense_decode.py (the
attention kernel), combine.py (merge of split partials), append.py (writes tokens into the cache); parts/ as you meet it.
"""
