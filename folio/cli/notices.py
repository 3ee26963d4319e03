"""The license of GPT-2's vocabulary, which every exported model contains."""

# The text of LICENSE in https://github.com/openai/gpt-2, with other line breaks.
VOCABULARY = """\
vocab.json, merges.txt and tokenizer.json contain the vocabulary of OpenAI's GPT-2 (encoder.json
and vocab.bpe of https://github.com/openai/gpt-2), which has this license:

Modified MIT License

Software Copyright (c) 2019 OpenAI

We don\u2019t claim ownership of the content you create with GPT-2, so it is yours to do with as you
please. We only ask that you use GPT-2 responsibly and clearly indicate your content was created
using GPT-2.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software. The above copyright notice and this permission notice need
not be included with content created by the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
