"""LangChain's standard tests of a chat model, run by the pytest of its own environment against a gateway."""
from __future__ import annotations

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestThroughPomex(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {"model": os.environ["CHAT_MODEL"], "base_url": os.environ["CHAT_URL"], "api_key": os.environ["CHAT_KEY"],
                "max_retries": 0, "stream_usage": True, "use_responses_api": False}

    @property
    def model_override_value(self):
        return os.environ["OTHER_MODEL"]

    supports_json_mode = True
    supports_image_inputs = False           # its test fetches a picture
    supports_image_tool_message = False
    supports_anthropic_inputs = False
    has_tool_choice = True
    has_structured_output = True
