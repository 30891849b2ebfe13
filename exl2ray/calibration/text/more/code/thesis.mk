# Builds a dissertation on medieval bridge tolls: figures from data, text from LaTeX, maps from QGIS exports.
#
#   make -f thesis.mk            the PDF
#   make -f thesis.mk chapter-4  one chapter, fast, with wrong cross-references
#   make -f thesis.mk print      everything the printer's wants, in one archive

MAKEFLAGS += --no-builtin-rules --warn-undefined-variables
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.DEFAULT_GOAL := thesis.pdf

PYTHON   ?= python3
LATEXMK  := latexmk -lualatex -interaction=nonstopmode -halt-on-error -silent
OUT      := build

CHAPTERS := $(sort $(wildcard chapters/[0-9]*.tex))
RAW      := $(wildcard data/raw/*.csv)
CLEAN    := $(RAW:data/raw/%.csv=data/clean/%.csv)
PLOTS    := $(patsubst plots/%.py,$(OUT)/fig/%.pdf,$(wildcard plots/*.py))
MAPS     := $(patsubst maps/%.svg,$(OUT)/fig/%.pdf,$(wildcard maps/*.svg))

# -- data ----------------------------------------------------------------------------------------

data/clean/%.csv: data/raw/%.csv tools/tolls.py data/coins.toml | data/clean/
	$(PYTHON) tools/tolls.py --coins data/coins.toml $< > $@

# All plots of one script come at once; a grouped target stops make from running it four times.
RATES := $(addprefix $(OUT)/fig/rates_,wine.pdf salt.pdf cattle.pdf exempt.pdf)
$(RATES) &: plots/multi/rates.py $(CLEAN) plots/style.mplstyle | $(OUT)/fig/
	$(PYTHON) $< --out $(OUT)/fig

# A plot says in its second line what it reads:   # data: avignon.csv, regensburg.csv
reads = $(addprefix data/clean/,$(shell sed -n '2s/^# data: *//p' plots/$(1).py | tr -d ,))
$(PLOTS): $(OUT)/fig/%.pdf: plots/%.py plots/style.mplstyle $$(call reads,$$*) | $(OUT)/fig/
	MPLCONFIGDIR=$(OUT) $(PYTHON) $< $@

$(MAPS): $(OUT)/fig/%.pdf: maps/%.svg | $(OUT)/fig/
	inkscape --export-type=pdf --export-filename=$@ $< 2> >(grep -v 'Gtk-WARNING' >&2 || true)

# -- text ----------------------------------------------------------------------------------------

thesis.pdf: thesis.tex preamble.tex $(CHAPTERS) sources.bib $(PLOTS) $(MAPS) $(RATES) $(OUT)/version.tex
	$(LATEXMK) -outdir=$(OUT) $<
	@! grep -E 'undefined (references|citations)' $(OUT)/thesis.log
	cp $(OUT)/thesis.pdf $@

$(OUT)/version.tex: FORCE | $(OUT)/
	@printf '\\newcommand\\draft{%s}\n' "$$(git describe --always --dirty)" > $@.new
	@cmp --silent $@.new $@ || mv $@.new $@

chapter-%: chapters/$$(notdir $$(wildcard chapters/%_*.tex)) preamble.tex
	$(LATEXMK) -outdir=$(OUT)/$@ -usepretex='\def\onlychapter{$*}' thesis.tex

# -- chores --------------------------------------------------------------------------------------

words: $(CHAPTERS)
	@for c in $^; do printf '%6d  %s\n' "$$(detex "$$c" | wc -w)" "$$c"; done
	@echo "(the faculty allows 100000)"

spell: $(CHAPTERS)
	@cat $^ | aspell --mode=tex --lang=en_GB --personal=./latin.pws list | sort -u

print: thesis.pdf
	pdffonts $< | awk 'NR > 2 && $$(NF-4) != "yes" { print "not embedded:", $$1; bad = 1 } END { exit bad }'
	tar --create --zstd --file thesis_print.tar.zst --transform 's,^,print/,' $< cover/front.pdf cover/spine.txt

clean:
	rm -rf $(OUT) data/clean

%/:
	mkdir -p $@

FORCE:
.PHONY: words spell print clean FORCE
.PRECIOUS: data/clean/%.csv %/
