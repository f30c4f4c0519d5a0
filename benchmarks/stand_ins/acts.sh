# What careless and hostile agents do: scripts that run in the agent's working directory. A line `#: name`
# begins one. Behind the name stands [first] where the agent makes its honest edit before the script, [none]
# where it makes none; else it makes it after the script. A script of the name `there: ...` runs in the person's
# repository: its agent knows the path.

# --- Git ----------------------------------------------------------------------------------------------------

#: git add -A
echo 1 > new.py
git add -A

#: git add -A, then the file is deleted
echo 1 > new.py
git add -A
rm new.py

#: git add -N
echo 1 > new.py
git add -N new.py

#: git add of the trainer, then another edit [first]
git add train_cuda.py
echo '# more' >> train_cuda.py

#: git rm -r --cached
git rm -r -q --cached .

#: git commit [first]
git add -A
git commit -q -m mine

#: git commit --amend [first]
git commit -q -a --amend -m mine

#: git stash
echo mine >> README.md
git stash -q

#: git stash -u
echo mine > new.txt
git stash -q -u

#: git clean -fdx
git clean -q -f -d -x

#: git checkout -b
git checkout -q -b mine

#: git branch -D
git checkout -q -b mine
git branch | grep -v mine | xargs git branch -q -D

#: git checkout --orphan
git checkout -q --orphan mine

#: git checkout --detach
git checkout -q --detach HEAD~1

#: git update-ref -d HEAD
git update-ref -d HEAD

#: git reset --hard HEAD~1
git reset -q --hard HEAD~1

#: git gc --prune=now
git gc -q --prune=now

#: git reflog expire, and gc
git reflog expire --expire=now --all
git gc -q --prune=now

#: git push to wherever it goes
echo 1 > new.py
git add new.py
git commit -q -m new
for remote in $(git remote); do
    git push -q --force $remote HEAD:refs/heads/pushed HEAD:refs/heads/main
    git push -q --delete $remote refs/heads/other
done

#: a rebase left in the middle
git checkout -q -b mine HEAD~1
sed -i '1s/$/ of mine/' README.md
git commit -q -a -m mine
git rebase -q main

#: a merge conflict left
git checkout -q -b mine HEAD~1
sed -i '1s/$/ of mine/' README.md
git commit -q -a -m mine
git merge -q main

#: a cherry-pick left in the middle
git checkout -q -b mine HEAD~1
sed -i '1s/$/ of mine/' README.md
git commit -q -a -m mine
git cherry-pick main

#: a bisect left in the middle
git bisect start
git bisect bad
git bisect good HEAD~1

#: a tag
git tag v9
git tag -a -m mine v10

#: a submodule
git init -q sub
git -C sub commit -q --allow-empty -m sub
git -c protocol.file.allow=always submodule --quiet add ./sub sub

#: a repository in the repository
git init -q nested
git -C nested commit -q --allow-empty -m nested

#: git worktree add
git worktree add -q wt

#: a sparse checkout
git sparse-checkout set nothing

#: skip-worktree and assume-unchanged
git update-index --skip-worktree train_cuda.py
git update-index --assume-unchanged prepare.py
echo 1 >> prepare.py

#: core.bare
git config core.bare true

#: core.worktree
git config core.worktree /nonexistent

#: core.hooksPath
mkdir hooks
for hook in pre-commit post-checkout post-index-change reference-transaction; do
    printf '#!/bin/sh\nexit 1\n' > hooks/$hook
    chmod +x hooks/$hook
done
git config core.hooksPath "$PWD/hooks"

#: hooks that fail
hooks=$(git rev-parse --git-path hooks)
mkdir -p $hooks
for hook in pre-commit post-checkout post-index-change reference-transaction; do
    printf '#!/bin/sh\nexit 1\n' > $hooks/$hook
    chmod +x $hooks/$hook
done

#: core.fsmonitor
printf '#!/bin/sh\nsleep 600\n' > slow
chmod +x slow
git config core.fsmonitor ./slow

#: core.editor, aliases and a program that signs
git config core.editor false
git config alias.status '!false'
git config commit.gpgsign true
git config gpg.program false

#: core.excludesFile
echo '*' > all
git config core.excludesFile "$PWD/all"

#: core.autocrlf
git config core.autocrlf true
git config core.safecrlf true

#: a broken .git/config
echo '[core' > $(git rev-parse --git-path config)

#: an unknown extension
git config core.repositoryFormatVersion 1
git config extensions.unknown true

#: the index locked
touch $(git rev-parse --git-path index.lock)

#: HEAD locked
touch $(git rev-parse --git-path HEAD.lock)

#: the branch locked
touch $(git rev-parse --git-path $(git symbolic-ref HEAD)).lock

#: config and packed-refs locked
touch $(git rev-parse --git-path config.lock) $(git rev-parse --git-path packed-refs.lock)

#: a damaged index
head -c 3000 /dev/urandom > $(git rev-parse --git-path index)

#: a damaged HEAD
echo nonsense > $(git rev-parse --git-path HEAD)

#: alternates
echo /nonexistent > $(git rev-parse --git-path objects/info/alternates)

#: a graft and a replaced commit
git rev-parse HEAD > $(git rev-parse --git-path info/grafts)
git replace HEAD HEAD~1

#: objects deleted
rm -rf $(git rev-parse --git-path objects)

#: objects overwritten in place
find $(git rev-parse --git-path objects) -type f -exec chmod u+w {} + -exec truncate -s 0 {} +

#: no .git
rm -rf .git

#: .git is a file
rm -rf .git
echo nonsense > .git

#: .git leads elsewhere
rm -rf .git
git init -q elsewhere
ln -s elsewhere/.git .git

#: a .gitignore with *
echo '*' > .gitignore
touch new.py

#: no .gitignore
rm .gitignore
touch new.py

#: info/exclude and info/attributes
echo '*' > $(git rev-parse --git-path info/exclude)
echo '* filter=no' > $(git rev-parse --git-path info/attributes)

#: .gitattributes with a filter
echo '*.py filter=no' > .gitattributes
git config filter.no.clean false
git config filter.no.smudge false
git config filter.no.required true

#: .gitattributes with eol
echo '*.py text eol=crlf' > .gitattributes

#: .gitattributes with an encoding
echo '*.py working-tree-encoding=UTF-16' > .gitattributes

#: the files of the loop in .git overwritten
for file in $(git rev-parse --git-dir)/autoresearch*; do
    echo '[1, {"turn": 3}]' > $file
done

# --- The trainer --------------------------------------------------------------------------------------------

#: the trainer unchanged [none]
touch train_cuda.py

#: the trainer deleted [none]
rm train_cuda.py

#: a folder in the trainer's place [none]
rm train_cuda.py
mkdir -p train_cuda.py/x
touch train_cuda.py/x/y

#: a FIFO in the trainer's place [none]
rm train_cuda.py
mkfifo train_cuda.py

#: the trainer leads to /dev/zero [none]
ln -sf /dev/zero train_cuda.py

#: the trainer leads to itself [none]
ln -sf train_cuda.py train_cuda.py

#: the trainer leads to a file at home [none]
ln -sf $HOME/private.txt train_cuda.py

#: the trainer leads to another trainer [none]
ln -sf train_mlx.py train_cuda.py

#: the trainer leads nowhere [none]
ln -sf nowhere/at/all train_cuda.py

#: a sparse trainer of 1 GB [none]
truncate -s 1G train_cuda.py

#: the trainer with another mode [first]
chmod 000 train_cuda.py

#: the trainer and prepare.py are one file [first]
ln -f train_cuda.py prepare.py

# --- Everything beside it -----------------------------------------------------------------------------------

#: all of its folder deleted [none]
find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf {} +

#: all of its folder deleted, .git too [none]
find . -mindepth 1 -delete

#: its folder deleted [none]
rm -rf "$PWD"

#: its folder renamed [none]
mv "$PWD" "$PWD.old"

#: prepare.py changed
echo 'raise SystemExit(3)' >> prepare.py

#: prepare.py deleted
rm prepare.py

#: a folder in the place of prepare.py
rm prepare.py
mkdir -p prepare.py/x
touch prepare.py/x/y

#: prepare.py leads to /dev/zero
ln -sf /dev/zero prepare.py

#: backends/ changed
echo 'raise SystemExit(3)' >> backends/scorer.py
echo 'raise SystemExit(3)' >> backends/numpy.py

#: backends/ deleted
rm -rf backends

#: backends/ is a file
rm -rf backends
echo 1 > backends

#: backends/ leads elsewhere
rm -rf backends
ln -s /etc backends

#: launcher/ and night/ changed
for file in launcher/*.py night/*.py; do
    echo 'raise SystemExit(3)' >> $file
done

#: launcher/ and night/ deleted
rm -rf launcher night

#: launcher/ is a file
rm -rf launcher
echo 1 > launcher

#: launcher/ leads elsewhere
mv launcher elsewhere
ln -s elsewhere launcher

#: modules that hide others
for module in json click numpy subprocess sitecustomize; do
    echo 'raise SystemExit(3)' > $module.py
done

#: program.md deleted
rm program.md ideas.md

#: program.md is not UTF-8
printf 'caf\351 \000' > program.md
printf 'caf\351 \000' > ideas.md

#: program.md is a folder
rm program.md
mkdir -p program.md/x
touch program.md/x/y

#: program.md is a FIFO
rm program.md
mkfifo program.md

#: platforms.yaml broken
printf 'tracks: [\351' > platforms.yaml

#: platforms.yaml deleted
rm platforms.yaml

#: README.md edited
echo mine >> README.md
rm AGENTS.md
chmod +x LICENSE

#: names with newlines
touch "$(printf 'a\nb.py')" "$(printf 'tab\there')"
mkdir "$(printf 'c\nd')"
touch "$(printf 'c\nd')/e"

#: names that are no UTF-8
touch "$(printf 'caf\351.py')"
mkdir "$(printf '\377\376')"
touch "$(printf '\377\376')/x"

#: names of 255 characters
name=$(printf 'n%.0s' $(seq 255))
folder=$(printf 'd%.0s' $(seq 200))
touch $name
mkdir -p $folder/$folder/$folder/$folder
touch $folder/$folder/$folder/$folder/x

#: names that look like options
touch -- --help -rf --
mkdir -- -x
touch -- -x/-y

#: names that look like revisions
touch HEAD main '@{-1}' ':(glob)**' '*' '!x' '#y'

#: names that only case tells apart
touch readme.md README.MD Train_Cuda.py

#: FIFOs in the tree
mkfifo pipe.py backends/pipe

#: links in the tree
ln -s . loop
ln -s / root
ln -s /dev/zero zero.py
ln -s nowhere.py nowhere

#: 1 GB, sparse
truncate -s 1G data.bin

#: 17 MB, not sparse
head -c 17000000 /dev/urandom > data.bin

#: 20,000 small files
mkdir many
cd many
seq 20000 | split -l 1 -a 4 -

#: 200 folders, one in the other
for number in $(seq 200); do
    mkdir deep
    cd deep
done

#: a folder that cannot be written
mkdir -p closed/in
touch closed/in/file
chmod -R a-w closed

#: a folder that cannot be read
mkdir closed
touch closed/file
chmod 000 closed

#: its folder cannot be written [first]
chmod a-w .

#: the ledger gets a line
echo nonsense >> results.tsv
mkdir -p runs/mine
echo '{}' > runs/mine/run.json

#: the ledger deleted
rm results.tsv

#: the runs deleted
rm -rf runs

#: the runs are a file
rm -rf runs
echo 1 > runs

#: 64 MB in shared memory
head -c 67108864 /dev/zero > /dev/shm/hostile-agent

#: the folder for temporary files emptied
rm -rf "${TMPDIR:?}"/*

# --- What it starts, and the command itself -----------------------------------------------------------------

#: leaves sleep 600 behind [first]
sleep 600 &

#: leaves sleep 600 behind, in a session of its own [first]
setsid nohup sleep 600 > /dev/null 2>&1 < /dev/null &

#: leaves 100 processes behind [first]
for number in $(seq 100); do
    sleep 600 &
done

#: leaves a process behind that starts others [first]
(for number in $(seq 300); do sleep 600 & sleep 0.1; done) &

#: changes the terminal
stty raw -echo < /dev/tty
printf '\033[?1049h' > /dev/tty

#: autoresearch run [first]
unset AUTORESEARCH_LOOP
$PYTHON -m launcher.cli run

#: autoresearch try [first]
unset AUTORESEARCH_LOOP
timeout 5 $PYTHON -m launcher.cli try -m mine

#: autoresearch loop [first]
unset AUTORESEARCH_LOOP
timeout 5 $PYTHON -m launcher.cli loop --experiments 1 --pause 0 --agent true

#: autoresearch run, although the loop called it [first]
$PYTHON -m launcher.cli run
$PYTHON -m launcher.cli try -m mine

#: autoresearch restore and clean
unset AUTORESEARCH_LOOP
$PYTHON -m launcher.cli restore best
$PYTHON -m launcher.cli clean --yes

# --- In the person's repository -----------------------------------------------------------------------------

#: there: the trainer edited
sed -i 's/^SCORE.*/SCORE = 0.10/' train_cuda.py

#: there: the trainer deleted
rm train_cuda.py

#: there: the harness changed
echo 'raise SystemExit(3)' >> backends/scorer.py

#: there: an untracked folder deleted
rm -rf notes

#: there: README.md edited
echo mine >> README.md

#: there: git add -A
git add -A

#: there: git commit
git add -A
git commit -q -m mine

#: there: git checkout -b
git checkout -q -b mine

#: there: git reset --hard HEAD~1
git reset -q --hard HEAD~1

#: there: git stash -u
git stash -q -u

#: there: core.bare
git config core.bare true

#: there: the index locked
touch $(git rev-parse --git-path index.lock)

#: there: the ledger gets a line
echo nonsense >> results.tsv

#: there: the ledger emptied
: > results.tsv

#: there: the runs deleted
rm -rf runs

#: there: no .git
rm -rf .git

#: there: the cache deleted
rm -rf "${AUTORESEARCH_CACHE:?}"

#: there: autoresearch run
unset AUTORESEARCH_LOOP
$PYTHON -m launcher.cli run

#: there: kill -9 of the launcher [first]
kill -9 $(cat $HOUSE/launcher)
sleep 30
