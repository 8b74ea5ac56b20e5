"""Quantize a causal language model while it loads, save it, reload it, and let it write a line.

python examples/quantize_and_save.py [--model FOLDER_OR_HUB_ID] [--weights int4] [--out FOLDER]
"""

import argparse
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import quanto_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=quanto_hf.tiny_lm())
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--prompt", default="Return the")
    parser.add_argument("--out", help="where the quantized model is saved; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or temporary
        config = quanto_hf.QuantoConfig(weights=args.weights)
        model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
        print(f"{quanto_hf.report(model).quantized_bits:.2f} bits per quantized weight")
        print(f"{model.get_memory_footprint() / 1e6:.1f} MB in memory")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

        reloaded = AutoModelForCausalLM.from_pretrained(out)
        inputs = tokenizer(args.prompt, return_tensors="pt")
        tokens = reloaded.generate(**inputs, max_new_tokens=30, do_sample=False)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
