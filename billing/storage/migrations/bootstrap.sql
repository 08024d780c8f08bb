-- What a DBA runs once, as superuser, before the first `billing migrate`. It can be run again.
-- Three roles: the owner makes the tables, the application reads and writes them under row-level
-- security, and a role that nobody can log in as owns the look-ups that come before a tenant is known.
--
--   billing migrate --bootstrap-sql | psql postgres
--
-- Then, in psql, what cannot stand in a script that is run twice:
--
--   \password billing_owner
--   \password billing_app
--   GRANT billing_owner TO CURRENT_USER;  -- only where you are no superuser
--   CREATE DATABASE billing OWNER billing_owner TEMPLATE template0 ENCODING 'UTF8';
--   \connect billing
--   SET ROLE pg_database_owner;  -- the same; without it PostgreSQL 15 grants nothing, and only warns
--   GRANT CREATE ON SCHEMA public TO billing_owner;
--
-- DATABASE_URL names billing_app, MIGRATION_DATABASE_URL billing_owner.

DO $$
BEGIN
    -- NOINHERIT: a member who inherits would fall under the other role's policies too.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'billing_owner') THEN
        CREATE ROLE billing_owner LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'billing_app') THEN
        CREATE ROLE billing_app LOGIN NOSUPERUSER NOBYPASSRLS;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'billing_lookup') THEN
        CREATE ROLE billing_lookup NOLOGIN NOSUPERUSER NOBYPASSRLS;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;  -- somebody else runs this at the same moment
END $$;

-- A statement that fails is logged with its values unless told otherwise, and some are hashes of passwords.
DO $$
BEGIN
    ALTER ROLE billing_app SET log_min_error_statement = 'panic';
    ALTER ROLE billing_app SET log_min_duration_statement = -1;
    ALTER ROLE billing_app SET log_statement = 'none';
    ALTER ROLE billing_app SET log_error_verbosity = 'terse';  -- the detail of a deadlock quotes them too
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'PostgreSQL may log the statements of billing_app: only a superuser can see to that.';
END $$;

-- So that migrations may hand the look-ups over.
GRANT billing_lookup TO billing_owner;
