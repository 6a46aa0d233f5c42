defmodule StarweaveImage.Queue.Recovery do
  @moduledoc false
  # What the queue writes of a request into the journal, and the jobs that it makes of what it finds there in its next
  # life: with what is left of their time, by a clock on the wall that may have been set meanwhile. Pure.

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.Job

  @typedoc "The time of day, in ms since 1970."
  @type wall :: integer

  @doc "The record of a request that is taken in at `wall`."
  @spec record(Request.t(), wall) :: %{String.t() => term}
  def record(request, wall),
    do: %{"request" => Request.to_record(request), "submitted_at" => wall}

  @doc """
  A request that had not ended: its job, with the ms until its deadline, all of them where the clock was set back; or,
  where it cannot be read by this version, a job that has ended with the error that says so.
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
  A request whose result is on disk: its job, and the ms for which it is still kept of the `ttl` that results have.
  `record` is what the journal has of the request itself; its result is there also where that cannot be read.
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

  @doc "The error where the journal cannot keep a request."
  @spec not_kept(String.t()) :: Error.t()
  def not_kept(why), do: Error.new(:unavailable, "the request cannot be kept on disk: #{why}")

  defp ended(request, result),
    do: Job.ended(%Job{request: request, submitted?: true, result: result})

  # What was asked for is not known, so nothing is the same as it.
  defp unreadable(id), do: %Request{id: id, durable: true, prompt: "", seed: 0}
end
