"""The page of ``todre ui``: one question, two methods, side by side.

``serve`` opens the page with ``gate`` in front, ``page`` lays it out, ``handler`` puts one question
to both methods, ``session`` holds the model, ``progress`` reports and stops, ``uploads`` reads
files, ``drawing`` and ``chart`` draw, and ``summary`` makes the tables. Only ``page`` and ``serve``
use gradio.
"""
