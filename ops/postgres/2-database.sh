#!/bin/sh
# What cannot stand in a script that is run twice: passwords and the database. Run once, by the image, after the roles.
set -eu
psql --username=postgres --set=ON_ERROR_STOP=1 --set=owner="$OWNER_PASSWORD" --set=app="$APP_PASSWORD" <<'SQL'
ALTER ROLE billing_owner PASSWORD :'owner';
ALTER ROLE billing_app PASSWORD :'app';
CREATE DATABASE billing OWNER billing_owner TEMPLATE template0 ENCODING 'UTF8';
\connect billing
GRANT CREATE ON SCHEMA public TO billing_owner;
SQL
