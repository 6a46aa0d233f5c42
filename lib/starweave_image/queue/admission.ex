defmodule StarweaveImage.Queue.Admission do
  @moduledoc false
  # Whether a request is accepted, and the error if it is refused. A known id means that the same request is made again,
  # which costs nothing. A new request needs a working instance (and a journal if it is durable), must not be in
  # quarantine, and must find room in the queue. The rate limit is checked last, so that refused requests use no tokens.
  # Pure.

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Fleet, Job, RateLimit, Schedule, Verdict}

  @enforce_keys [:journal?, :rates]
  defstruct [:journal?, :rates]

  @type t :: %__MODULE__{journal?: boolean, rates: RateLimit.t()}
  @typedoc "What the decision depends on, with the time in ms."
  @type facts :: %{fleet: Fleet.t(), verdict: Verdict.t(), schedule: Schedule.t(), now: integer}

  @spec new(keyword) :: t
  def new(config) do
    rates = RateLimit.new(config[:rate_limit], config[:user_rate_limit])
    %__MODULE__{journal?: config[:journal] != nil, rates: rates}
  end

  @doc """
  Decides about a request, which may be `owned?` by its caller; `known` is the job that already has its id, or nil. The
  request joins that job, is accepted (and replaces that job, if it had failed), or is refused.
  """
  @spec decide(t, Request.t(), boolean, Job.t() | nil, facts) ::
          :join | {:take_in, t} | {:error, Error.t()}
  def decide(admission, request, owned?, known, facts) do
    cond do
      known == nil or Job.failed?(known) -> take_in(admission, request, owned?, facts)
      Request.same?(known.request, request) -> :join
      true -> {:error, conflict()}
    end
  end

  defp take_in(admission, request, owned?, facts) do
    with :ok <- durable(admission, request, owned?),
         nil <- Fleet.closed(facts.fleet),
         :ok <- Verdict.admit(facts.verdict, request, facts.now),
         :ok <- Schedule.admit(facts.schedule, Request.bytes(request)),
         {:ok, rates} <- RateLimit.take(admission.rates, request.user_id, facts.now) do
      {:take_in, %{admission | rates: rates}}
    else
      {:overloaded, ms} -> {:error, overloaded(Schedule.waiting(facts.schedule), ms)}
      {:wait, ms} -> {:error, rate_limited(ms)}
      {:error, error} -> {:error, error}
      %Error{} = error -> {:error, error}
    end
  end

  defp durable(_admission, %{durable: false}, _owned?), do: :ok

  defp durable(%{journal?: false}, _request, _owned?),
    do: {:error, invalid(:durable, "durable needs the instance's option journal")}

  defp durable(_admission, _request, false), do: :ok

  defp durable(_admission, _request, true),
    do: {:error, invalid(:durable, "durable is for submit, which does not end with its caller")}

  @doc "The error for an id that no request has."
  @spec unknown_id() :: Error.t()
  def unknown_id, do: invalid(:id, "no request has this id, or it ended too long ago")

  defp overloaded(queued, ms) do
    Error.new(:overloaded, "the queue is full (#{queued} requests wait): try again later", %{
      retry_after_ms: ms
    })
  end

  defp rate_limited(ms) do
    seconds = :erlang.float_to_binary(ms / 1000 + 0.05, decimals: 1)
    message = "too many requests: try again in #{seconds} s"
    Error.new(:rate_limited, message, %{retry_after_ms: ms})
  end

  defp conflict do
    Error.new(:invalid_request, "id is that of another request, with other content", %{
      field: :id,
      conflict: true
    })
  end

  defp invalid(field, message), do: Error.new(:invalid_request, message, %{field: field})
end
