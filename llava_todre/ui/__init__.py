"""The page of ``todre ui``: one question, two methods, side by side.

``uploads`` reads what visitors send, ``session`` holds the model and answers piece by piece,
``progress`` reports progress and stops, ``drawing`` and ``chart`` make the pictures, ``summary``
the words next to them, and ``handler`` puts one question to both methods. Only ``page``, where
everything has its place, and ``serve``, which opens it, know gradio.
"""
