"""The engine of served models (`engine: {fn: openai}`): requests to an endpoint, and their answers on disk."""
