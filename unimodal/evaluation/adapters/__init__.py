"""Our models inside other projects' evaluation suites. Each module needs its suite installed; nothing here imports them."""
