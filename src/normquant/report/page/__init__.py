"""The page of an audit, or of two: launches in the order in which they run, what they pass on, and what is wrong.

`timeline` reads a report, `alignment` sets two side by side, `folding` finds the layers that repeat, `flow` places
boxes and ribbons, `view` gathers what is shown, and `html` fills the templates.
"""
