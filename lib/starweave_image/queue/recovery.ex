defmodule StarweaveImage.Queue.Recovery do
  @moduledoc false
  # The journal record of a request, and the jobs that are made from the records after a restart, with their remaining
  # times. Those are by the wall clock, which may have been set meanwhile. Pure.

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.Job

  @typedoc "Wall-clock time, in ms since 1970."
  @type wall :: integer

  @doc "The record of a request accepted at `wall`."
  @spec record(Request.t(), wall) :: %{String.t() => term}
  def record(request, wall),
    do: %{"request" => Request.to_record(request), "submitted_at" => wall}

  @doc """
  An unfinished request: its job, with the ms until its deadline (the full time if the clock was set back); or, if this
  version cannot read the record, a job that has ended with an error that says so.
  """
  @spec unfinished(map, atom, wall) ::
          {:ok, Job.t(), left_ms :: non_neg_integer} | {:error, Job.t()}
  def unfinished(%{id: id, job: record, attempts: ends}, instance, wall) do
    case Request.restore(record["request"], instance) do
      {:ok, %{timeout: timeout} = request} ->
        elapsed = wall - record["submitted_at"]
        job = %Job{request: request, model: request.model, submitted?: true, ends: ends}
        {:ok, job, timeout - min(max(elapsed, 0), timeout)}

      {:error, error} ->
        {:error, ended(unreadable(id), {:error, error})}
    end
  end

  @doc """
  A request whose result is on disk: its job, and how many ms of the results' `ttl` remain. `record` is the journal's
  record of the request itself; the result is available even if that cannot be read.
  """
  @spec finished(map, {:ok, map} | {:error, term}, atom, wall, non_neg_integer) ::
          {Job.t(), left_ms :: non_neg_integer}
  def finished(%{id: id, finished_at: at, outcome: outcome}, record, instance, wall, ttl) do
    request =
      with {:ok, %{job: record}} <- record,
           {:ok, request} <- Request.restore(record["request"], instance) do
        request
      else
        {:error, _} -> unreadable(id)
      end

    {ended(request, {:stored, outcome}), max(ttl - max(wall - at, 0), 0)}
  end

  @doc "The error for a request that the journal cannot keep."
  @spec not_kept(String.t()) :: Error.t()
  def not_kept(why), do: Error.new(:unavailable, "the request cannot be kept on disk: #{why}")

  defp ended(request, result),
    do: Job.ended(%Job{request: request, submitted?: true, result: result})

  # A stand-in, since the request's content is unknown; no other request can equal it.
  defp unreadable(id), do: %Request{id: id, durable: true, prompt: "", seed: 0}
end
