#!/bin/bash
# A private Slurm on this machine for tests: `cluster.sh start FOLDER`, SLURM_CONF=FOLDER/slurm.conf sbatch ..., `cluster.sh stop FOLDER`.
# Two nodes, both this machine, each with 8 CPUs and 2 GPUs that do not exist. Needs Debian's slurm-wlm and munge, but no root.
set -euo pipefail
folder=$(realpath "$2") host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

stop() {
    scancel --user="$(id -un)" || true
    for _ in $(seq 150); do  # the end of a job needs the daemons
        if [ -z "$(squeue --noheader)" ]; then break; fi
        sleep 0.2
    done
    for pid in "$folder"/*.pid; do
        if [ -f "$pid" ]; then kill "$(cat "$pid")" || true; fi
    done
}
if [ "$1" = stop ]; then stop; exit; fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
mkdir -p "$folder"/{munge,state,spool/node1,spool/node2,log}
chmod 755 "$folder/munge"
printf 'Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n' > "$folder/gres.conf"
cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=30
MinJobAge=3600
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

(umask 077; head -c 128 /dev/urandom > "$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
slurmctld
slurmd -N node1
slurmd -N node2
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --Node --format=%t 2>&1 | uniq)" = idle ]; then exit; fi
    sleep 0.2
done
echo "the nodes did not become idle: $(sinfo 2>&1; tail -n 5 "$folder"/log/*.log)" >&2
stop
exit 1
