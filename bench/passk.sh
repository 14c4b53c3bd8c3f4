#!/usr/bin/env bash
#
# pass@k (k = 1 to 16) of the toy cascade, before and after each RL stage, on the skill that the stage teaches
# and on its hard problems. Does RL solve problems that its start could not, or does it only find at once what
# its start found in sixteen tries? (evals/pass_at.py; the question is that of arXiv 2504.13837.)
#
#   bash bench/passk.sh      needs a finished `bash run_cascade.sh`; ends with the report of the run
#
# Environment variables: those of run_cascade.sh. Result lines go to $OUT/passk.jsonl, so that results.jsonl
# stays as it is. Samples that the cascade has drawn are used again, and an interrupted run goes on.

source "$(dirname "$0")/../run_cascade.sh" toy
setup

before=sft2
for name in rlhf ifrl mathrl coderl swerl; do
    # The skill of the stage, in the mode in which the stage trains; chat has no hard problems. RLHF costs
    # instruction following, so that before IF-RL there is the SFT checkpoint, too.
    mode=think checkpoints="$before $name"
    case $name in
        rlhf) tasks=chat ;;
        ifrl) tasks=if,if_hard mode=no_think checkpoints="sft2 rlhf ifrl" ;;
        mathrl) tasks=math,math_hard ;;
        coderl) tasks=code,code_hard ;;
        swerl) tasks=swe,swe_hard ;;
    esac
    for checkpoint in $checkpoints; do
        label=${checkpoint/sft2/sft}
        if [ -e "$OUT/$name/passk_$label" ]; then continue; fi
        run $LAUNCH evaluate.py --model="$OUT/$checkpoint/final" --stage="$label" \
            --tasks=$tasks --modes=$mode --decodings=sampled,paper --pass_at=1,2,4,8,16 \
            --data="$OUT/data" --limit=250 --label_seed="$SEED" --results="$OUT/passk.jsonl"
        run touch "$OUT/$name/passk_$label"
    done
    before=$name
done
run .venv/bin/python -m evals.report --run="$OUT"
