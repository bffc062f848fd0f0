"""Pages for the people who press the button: rendered here, and asked of the same HTTP API that everybody has.

Flow: browser -> page -> the API, in this process, with what the browser showed -> JSON -> template -> HTML.
"""
