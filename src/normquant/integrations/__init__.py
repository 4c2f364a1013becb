"""Where normquant meets a framework; each file imports one, and only when it is called by it."""
