def page(rows, keys, words): return ""
