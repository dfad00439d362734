#!/bin/sh
# A PostgreSQL server for Optuna studies that several machines share, without root and without Docker.
#
#   sh examples/study_database.sh start FOLDER [PORT [ADDRESS]]    # prints the URL for --storage
#   sh examples/study_database.sh stop FOLDER
#
# Needs PostgreSQL's programs (Debian: apt install postgresql). FOLDER is made, and keeps data, log and password; ADDRESS is
# 127.0.0.1 unless other machines are to reach it. As root it runs as the user postgres, since PostgreSQL refuses root.
set -eu

usage() { echo "usage: study_database.sh start FOLDER [PORT [ADDRESS]] | stop FOLDER" >&2; exit 2; }
[ $# -ge 2 ] || usage
command=$1; folder=$2; port=${3:-5433}; address=${4:-127.0.0.1}

programs=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1 || true)
PATH=${programs:+$programs:}$PATH
command -v initdb >/dev/null || { echo "there is no PostgreSQL here: apt install postgresql, or conda install postgresql" >&2; exit 1; }

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$folder"
    chown postgres "$folder"
    runuser -u postgres -- test -x "$(dirname "$folder")" || {
        echo "the user postgres cannot reach $folder: choose another folder, /var/lib/postgresql/studies, say" >&2
        exit 1
    }
    exec runuser -u postgres -- env PATH="$PATH" sh -s -- "$@" < "$0"  # this file may be where postgres cannot read
fi

if [ "$command" = stop ]; then
    exec pg_ctl -D "$folder/data" -m fast -w stop >&2
fi
[ "$command" = start ] || usage

mkdir -p "$folder"
if [ ! -f "$folder/password" ]; then
    (umask 077; od -An -N16 -tx1 /dev/urandom | tr -d ' \n' > "$folder/password")
fi
if [ ! -f "$folder/data/PG_VERSION" ]; then
    initdb -D "$folder/data" -U studies --pwfile="$folder/password" -A scram-sha-256 -E UTF8 >&2
fi
# Whoever knows the password may come from the addresses that the server listens on.
grep -qx "host all all all scram-sha-256" "$folder/data/pg_hba.conf" ||
    echo "host all all all scram-sha-256" >> "$folder/data/pg_hba.conf"
pg_ctl -D "$folder/data" status >/dev/null 2>&1 || pg_ctl -D "$folder/data" -l "$folder/log" -w \
    -o "-p $port -c listen_addresses=$address -c unix_socket_directories=" start >&2
port=$(sed -n 4p "$folder/data/postmaster.pid")  # of one that ran already it may be another
[ "$address" != 0.0.0.0 ] || address=$(hostname -I | cut -d " " -f 1)
PGPASSWORD=$(cat "$folder/password")
export PGPASSWORD
psql -h "$address" -p "$port" -U studies -d postgres -tAc "SELECT 1 FROM pg_database WHERE datname = 'studies'" | grep -q 1 ||
    psql -h "$address" -p "$port" -U studies -d postgres -qc "CREATE DATABASE studies" >&2
echo "postgresql+psycopg://studies:$PGPASSWORD@$address:$port/studies"
