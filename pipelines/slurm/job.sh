#!/bin/bash
# {{ name }}: edit this file and submit it with sbatch, or all jobs with submit.sh beside it.
#SBATCH --job-name={{ name }}
#SBATCH --chdir={{ folder }}
#SBATCH --output={{ log }}
#SBATCH --open-mode=append
{% for option in options %}
#SBATCH {{ option }}
{% endfor %}
{% for line in setup %}
{{ line }}
{% endfor %}
{% if stops %}

# 90 s before the time limit, Slurm sends SIGUSR1 to this script only (B:), which passes it on. A training then saves and ends; a build
# ends, and its finished shards are kept. The requeued job has the same id and continues. After scancel, which sends SIGTERM to all
# processes of the job, this script only waits until the training has saved.
stopped=
trap 'stopped=1; kill -USR1 $!' USR1
trap : TERM
run() {
    "$@" &  # bash runs a trap only after its foreground command
    wait $!; code=$?
    while kill -0 $! 2>/dev/null; do wait $!; code=$?; done  # a signal ends a wait early
    if [ $code -eq 0 ]; then return; fi
    if [ -n "$stopped" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit $code
}
{% for command in commands %}
run {{ command }}
{% endfor %}
{% else %}

set -e
{% for command in commands %}
{{ command }}
{% endfor %}
{% endif %}
{% if done %}
mkdir -p {{ done_folder }}
touch {{ done }}
{% endif %}
